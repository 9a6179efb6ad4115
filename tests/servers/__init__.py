"""What stands on the far side in tests: scripted servers and hosts, databases, a browser, workers."""

"""The other side of tests: scripted servers and hosts, databases, a browser, workers."""

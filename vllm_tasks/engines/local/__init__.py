"""A vLLM engine in a child process, which this process starts and watches."""

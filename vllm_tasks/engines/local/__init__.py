"""A vLLM engine in a process of its own, started and watched by this one."""

"""`python -m vllm_tasks`: the command line."""

from vllm_tasks._cli.app import main

if __name__ == "__main__":
    main()

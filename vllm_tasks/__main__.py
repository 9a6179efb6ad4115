"""`python -m vllm_tasks`: the command line."""

import sys

if __name__ == "__main__":
    try:
        from vllm_tasks._cli.app import main

        main()
    except KeyboardInterrupt:  # while it imports; a command ends in the same way
        sys.exit(130)

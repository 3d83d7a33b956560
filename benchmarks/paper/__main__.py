"""`python -m benchmarks.paper`: see `benchmarks.paper.command`, a module of its own, since processes beside each other import it."""

from benchmarks.paper.command import main

if __name__ == "__main__":
    main()

"""`python -m pertoken` is the command `pertoken`, of the Python that is meant."""

from pertoken.cli import main

if __name__ == "__main__":
    main()

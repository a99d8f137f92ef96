"""`python -m pertoken.cli`."""

from pertoken.cli import main

if __name__ == "__main__":
    main()

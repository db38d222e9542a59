"""`python -m glassgpt`, which is what `torchrun -m glassgpt train ...` starts on every device."""

from glassgpt.cli.app import main

if __name__ == "__main__":
    main()

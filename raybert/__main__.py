"""``python -m raybert``."""

from raybert.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

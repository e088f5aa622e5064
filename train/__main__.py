"""`python -m train RECIPE key=value`: `postshare run`, also under a launcher."""

from train.cli import launched

if __name__ == "__main__":
    launched()

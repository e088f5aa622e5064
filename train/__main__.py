"""`accelerate launch ... -m train RECIPE key=value`: the main job on any number of processes."""

from train.cli import launched

if __name__ == "__main__":
    launched()

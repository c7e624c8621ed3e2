"""A training with a monitor, to be killed. Arguments: output folder, probe file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from monitor_kit import kept

if __name__ == "__main__":
    kept(Path(sys.argv[1]), sys.argv[2])

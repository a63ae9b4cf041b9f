"""What Fedloop costs, as ratios against peers that are measured in the same run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "deploy" / "kafka"))  # the brokers, which the tests start too

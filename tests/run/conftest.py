"""litdata brings torchvision, which must fit torch's build: its tests run where it is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("litdata") else ["test_litdata_streams.py"]

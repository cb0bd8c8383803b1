"""Speed and memory, measured: what `make bench` and its neighbours run. Not part of the test suite."""

"""The benchmark suite: `fastpeft bench`, in a clone also `python -m benches.cli` and `pytest benches`."""

"""The benchmark suite: `fastpeft bench`, `python -m benches.cli` in a clone, or `pytest benches --benchmark-json out.json`."""

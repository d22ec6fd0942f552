"""What all tests share: files `texts/*.ir` are tests too, and `--accept` rewrites their expectations."""

pytest_plugins = ["moec.text_tests", "pytester"]  # the second runs the first in tests of itself

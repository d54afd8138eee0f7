"""Data models of a report and of a search; other packages fill them in and print them."""

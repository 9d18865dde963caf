"""Two prefixes, one continuation: where one helps more, and what it reads."""

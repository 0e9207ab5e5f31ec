"""Results in words and tables, for the terminal, Markdown and html; pages and figures are drawn from the same."""

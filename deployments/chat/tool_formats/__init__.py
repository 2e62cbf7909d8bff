"""How models write tool calls: one file for each family, and a table of them all."""

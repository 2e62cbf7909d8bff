"""How models write calls of tools: one file for each family, and a table of them all."""

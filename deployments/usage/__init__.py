"""What API keys have used: entries, where they wait, and the record that keeps them."""

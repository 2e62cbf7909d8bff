"""Anthropic's Messages API, on top of the same chats."""

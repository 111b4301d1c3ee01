"""The consortium's commands, by what they are about."""

"""Rivals of TAD and IWD, as callbacks: what a user could do without them. README.md describes each one."""

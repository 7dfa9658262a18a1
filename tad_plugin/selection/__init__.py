"""What a user would do without this plugin, as callbacks: the rivals that TAD and IWD are always seen beside."""

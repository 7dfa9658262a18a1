"""The seam between a loop and the methods: the state, the events, the callbacks and the hook."""

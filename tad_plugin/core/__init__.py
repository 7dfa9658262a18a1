"""The interface between loops and methods: the state, the events, the callbacks and the hook."""

"""The hook, which a training script holds. Use :func:`tad_plugin.attach` and :class:`tad_plugin.Hook`."""

"""Modules of a converted model: they hold packed buffers and call ops."""

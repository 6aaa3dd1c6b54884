"""What knows torch modules: devices, binding, streaming, loading."""

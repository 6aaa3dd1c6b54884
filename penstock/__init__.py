"""penstock: the runtime for models that are larger than the machine."""

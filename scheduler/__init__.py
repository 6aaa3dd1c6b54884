"""Policy and time, without torch: access order, residency, plan, executor, timeline."""

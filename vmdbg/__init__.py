"""A debugger for hypervisors: an AMD-V machine whose hypervisor and guests are GDB inferiors."""

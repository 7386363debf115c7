# /// job
# image = "../hypervisor/build/hypervisor.elf"
# options = { append = "guests=1" }
# status = 1
# ///
# gdb's own words: an error, or a status of `quit`, fails the test.
break main
continue
if $rip != (long)&main
  quit 1
end
monitor expect cr0 & 0x80000000
python
frame = gdb.selected_frame()
assert frame.name() == "main", frame.name()
end
continue

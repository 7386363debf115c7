/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How fast is the way into a guest and back? n= round trips (100000), each one VMRUN and one #VMEXIT.
 *   mode=vmmcall (the default) or mode=cpuid: what makes the guest exit
 *   switch=bare (the default): VMRUN alone; switch=full: with CLGI, VMLOAD, VMSAVE and STGI around it, as a hypervisor does it
 * Someone who measures takes the time between the lines "start" and "done".
 */
#include "arguments.h"
#include "cpu.h"
#include "print.h"
#include "vmcb.h"

#define PAGE __attribute__((aligned(4096)))

static struct vmcb vmcb, host_vmcb;
static uint8_t host_save_area[4096] PAGE;
static uint64_t pml4[512] PAGE, pdpt[512] PAGE, directory[512] PAGE;

/* round.S */
void round_bare(uint64_t vmcb, uint64_t host_vmcb);
void round_full(uint64_t vmcb, uint64_t host_vmcb);
extern const uint8_t guest_vmmcall[], guest_cpuid[];

static void prepare(const uint8_t *entry)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, (uint64_t)host_save_area);
    /* Nested tables: 1 GiB, identity, in 2 MiB pages; present, writable, user. */
    pml4[0] = (uint64_t)pdpt | 7;
    pdpt[0] = (uint64_t)directory | 7;
    for (uint64_t i = 0; i < 512; i++)
        directory[i] = i << 21 | 0x87;
    vmcb.intercept1 = INTERCEPT_CPUID;
    vmcb.intercept2 = INTERCEPT_VMRUN | INTERCEPT_VMMCALL;
    vmcb.asid = 1;
    vmcb.np_enable = 1;
    vmcb.n_cr3 = (uint64_t)pml4;
    vmcb.int_control = V_INTR_MASKING;
    vmcb.g_pat = 0x0007040600070406;
    vmcb.cs = (struct segment){.selector = 0x08, .attributes = 0xc9b, .limit = 0xffffffff};
    vmcb.ds = vmcb.es = vmcb.ss = (struct segment){.selector = 0x10, .attributes = 0xc93, .limit = 0xffffffff};
    vmcb.fs = vmcb.gs = vmcb.ds;
    vmcb.tr = (struct segment){.attributes = 0x8b, .limit = 0xffff};
    vmcb.ldtr = (struct segment){.attributes = 0x82, .limit = 0xffff};
    vmcb.efer = EFER_SVME;
    vmcb.cr0 = CR0_PE | CR0_ET; /* 32-bit protected mode, no paging of its own */
    vmcb.dr6 = 0xffff0ff0;
    vmcb.dr7 = 0x400;
    vmcb.rflags = 2;
    vmcb.rip = (uint64_t)entry;
    __asm__ volatile("vmsave" : : "a"(&host_vmcb) : "memory");
}

_Noreturn void main(uint32_t information)
{
    serial_start();
    uint64_t n = number_argument(information, "n=", 100000);
    int by_cpuid = has_argument(information, "mode=cpuid");
    int full = has_argument(information, "switch=full");
    uint64_t code = by_cpuid ? EXIT_CPUID : EXIT_VMMCALL, length = by_cpuid ? 2 : 3;
    if (cpuid(0x80000000, 0).eax < 0x8000000a || !(cpuid(0x80000001, 0).ecx & 1 << 2) || !(cpuid(0x8000000a, 0).edx & 1))
        fatal("this CPU has no SVM, or SVM without nested paging. With QEMU: -cpu EPYC,+svm,+npt");
    prepare(by_cpuid ? guest_cpuid : guest_vmmcall);
    print("worldswitch: start: %u round trips by %s, %s\n", n, by_cpuid ? "CPUID" : "VMMCALL",
          full ? "CLGI VMLOAD VMRUN VMSAVE VMLOAD STGI" : "VMRUN alone");
    for (uint64_t i = 0; i < n; i++) {
        if (full)
            round_full((uint64_t)&vmcb, (uint64_t)&host_vmcb);
        else
            round_bare((uint64_t)&vmcb, (uint64_t)&host_vmcb);
        if (vmcb.exit_code != code) {
            print("worldswitch: EXITCODE %x, not %x, at rip %x\n", vmcb.exit_code, code, vmcb.rip);
            end(1);
        }
        vmcb.rip += length;
    }
    print("worldswitch: done\n");
    end(0);
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "svm.h"
#include "cpu.h"
#include "memory.h"
#include "print.h"

int has_next_rip;

/* What GS points to while the hypervisor runs: VMRUN does not switch GS, so finding `self` behind it after a #VMEXIT
   proves that VMLOAD brought the host's GS back. */
static struct per_cpu { struct per_cpu *self; } per_cpu;

/* One bit a port, all of them intercepted; three pages, for an access at port FFFF may reach beyond it (APM2 15.10.1). */
static uint8_t io_map[3 * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
/* Two bits an MSR, read and write (APM2 15.11). */
static uint8_t msr_map[2 * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
/* The processor keeps the host's registers here while a guest runs (APM2 15.30.4). Its format is nobody's business. */
static uint8_t host_save_area[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
/* A VMCB that never runs: where VMSAVE put the host's FS, GS, TR, LDTR and system-call MSRs. */
static struct vmcb host_vmcb;

static void pass_msr(uint32_t msr)
{
    /* Three ranges of 2000h MSRs, 800h bytes of map each: 0, C000_0000, C001_0000. */
    uint32_t range = msr < 0x2000 ? 0 : (msr >> 16) - 0xc000 + 1;
    uint32_t bit = (msr & 0x1fff) * 2;
    msr_map[range * 0x800 + bit / 8] &= (uint8_t) ~(3u << bit % 8);
}

void svm_start(void)
{
    if (cpuid(0x80000000, 0).eax < 0x8000000a || !(cpuid(0x80000001, 0).ecx & 1 << 2))
        fatal("this CPU has no SVM (CPUID 80000001 ECX[2] = 0). With QEMU: -cpu EPYC,+svm,+npt");
    if (rdmsr(MSR_VM_CR) & VM_CR_SVMDIS)
        fatal("SVM is disabled (VM_CR.SVMDIS = 1): enable it in the firmware's settings");
    struct cpuid svm = cpuid(0x8000000a, 0);
    if (!(svm.edx & 1))
        fatal("this CPU has SVM but no nested paging (CPUID 8000000A EDX[0] = 0). With QEMU: -cpu EPYC,+svm,+npt");
    if (svm.ebx <= MAX_GUESTS)
        fatal("this CPU has too few ASIDs (CPUID 8000000A EBX)");
    has_next_rip = svm.edx >> 3 & 1;
    print("hypervisor: SVM revision %u, %u ASIDs, nested paging%s\n", (uint64_t)(svm.eax & 0xff), (uint64_t)svm.ebx,
          has_next_rip ? ", next-RIP saving" : "");

    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME); /* until now VMRUN is #UD (APM2 15.4) */
    wrmsr(MSR_VM_HSAVE_PA, physical(host_save_area));

    per_cpu.self = &per_cpu;
    wrmsr(MSR_GS_BASE, (uint64_t)&per_cpu);
    /* The host's values never change from here on, so saving them once is enough. TR must be loaded by now. */
    __asm__ volatile("vmsave" : : "a"(physical(&host_vmcb)) : "memory");

    memset(io_map, 0xff, sizeof io_map);
    memset(msr_map, 0xff, sizeof msr_map);
    /* A guest may have these to itself: VMSAVE and VMLOAD switch them. */
    pass_msr(MSR_FS_BASE);
    pass_msr(MSR_GS_BASE);
    pass_msr(MSR_KERNEL_GS_BASE);
}

void svm_prepare(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    vmcb->intercept1 = INTERCEPT_INTR | INTERCEPT_NMI | INTERCEPT_RDPMC | INTERCEPT_CPUID | INTERCEPT_INVD |
                       INTERCEPT_HLT | INTERCEPT_INVLPGA | INTERCEPT_IOIO | INTERCEPT_MSR | INTERCEPT_SHUTDOWN;
    /* VMRUN is illegal without the VMRUN intercept (APM2 15.5.1). A guest gets none of the SVM instructions. */
    vmcb->intercept2 = INTERCEPT_VMRUN | INTERCEPT_VMMCALL | INTERCEPT_VMLOAD | INTERCEPT_VMSAVE | INTERCEPT_STGI |
                       INTERCEPT_CLGI | INTERCEPT_SKINIT | INTERCEPT_WBINVD | INTERCEPT_MONITOR | INTERCEPT_MWAIT |
                       INTERCEPT_XSETBV;
    vmcb->iopm_base = physical(io_map);
    vmcb->msrpm_base = physical(msr_map);
    /* An ASID of its own keeps a guest's TLB entries apart from everyone else's; 0 is the host (APM2 15.16). */
    vmcb->asid = (uint32_t)guest->number;
    vmcb->tlb_control = TLB_FLUSH_ALL; /* once: the ASID may have had another owner before us */
    /* V_INTR_MASKING: the guest's RFLAGS.IF rules virtual interrupts only, ours rules physical ones (APM2 15.21.1).
       A guest with interrupts off can then not lock out our timer. */
    vmcb->int_control = V_INTR_MASKING;
    vmcb->clean = 0; /* we promise nothing about unchanged fields: the processor reads them all (APM2 15.15) */
}

void svm_enter(struct guest *guest)
{
    vmrun(physical(guest->vmcb), &guest->registers, physical(&host_vmcb));
    guest->vmcb->tlb_control = 0;

    struct per_cpu *self;
    __asm__ volatile("movq %%gs:0, %0" : "=r"(self));
    if (self != &per_cpu)
        fatal("the host's GS base did not survive the guest");
}

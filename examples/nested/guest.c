/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "guest.h"
#include "cpu.h"
#include "exits.h"
#include "level.h"
#include "nest.h"
#include "timer.h"

#define MULTIBOOT_MAGIC 0x2badb002u
#define MULTIBOOT_INFORMATION 0x1000u /* gpa */

struct guest guest;
struct statistics statistics;
int has_next_rip;
uint8_t io_map[3 * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
uint8_t msr_map[2 * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static uint8_t host_save_area[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static struct vmcb host_vmcb; /* where VMSAVE put our FS, GS, TR, LDTR and system-call MSRs */

struct vmcb *running(void)
{
    return guest.nested ? guest.nested->vmcb : guest.vmcb;
}

void *guest_memory(uint64_t gpa, uint64_t size)
{
    return gpa <= guest_memory_size() - size ? (void *)(GUEST_START + gpa) : 0;
}

struct vmcb *guest_page(uint64_t gpa)
{
    return gpa & (PAGE_SIZE - 1) ? 0 : guest_memory(gpa, PAGE_SIZE);
}

int guest_gif(void)
{
    return with_vgif ? !!(guest.vmcb->int_control & V_GIF) : guest.gif;
}

void set_guest_gif(int gif)
{
    if (with_vgif)
        guest.vmcb->int_control = (guest.vmcb->int_control & ~V_GIF) | (gif ? V_GIF : 0);
    else
        guest.gif = gif;
}

uint32_t intercepts2(uint32_t int_control, uint64_t lbr_control)
{
    uint32_t always = INTERCEPT_VMRUN | INTERCEPT_VMMCALL | INTERCEPT_SKINIT | INTERCEPT_WBINVD | INTERCEPT_MONITOR |
                      INTERCEPT_MWAIT | INTERCEPT_XSETBV;
    return always | (int_control & V_GIF_ENABLE ? 0 : INTERCEPT_STGI | INTERCEPT_CLGI) |
           (lbr_control & VIRTUAL_VMLOAD_VMSAVE ? 0 : INTERCEPT_VMLOAD | INTERCEPT_VMSAVE);
}

static void svm_start(void)
{
    if (cpuid(0x80000000, 0).eax < 0x8000000a || !(cpuid(0x80000001, 0).ecx & 1 << 2))
        fatal("this CPU has no SVM (CPUID 80000001 ECX[2] = 0). With QEMU: -cpu EPYC,+svm,+npt");
    if (rdmsr(MSR_VM_CR) & VM_CR_SVMDIS)
        fatal("SVM is disabled (VM_CR.SVMDIS = 1): enable it in the firmware's settings");
    struct cpuid svm = cpuid(0x8000000a, 0);
    if (!(svm.edx & SVM_NP) || svm.ebx < ASIDS)
        fatal("this CPU has SVM but no nested paging, or too few ASIDs (CPUID 8000000A EDX[0], EBX)");
    if ((with_vgif && !(svm.edx & SVM_VGIF)) || (with_vls && !(svm.edx & SVM_VLS)))
        fatal("vgif or vls: this CPU does not have the feature (CPUID 8000000A EDX[16], EDX[15])");
    has_next_rip = svm.edx & SVM_NRIPS;
    physical_bits = cpuid(0x80000008, 0).eax & 0xff;
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, physical(host_save_area));
    __asm__ volatile("vmsave" : : "a"(physical(&host_vmcb)) : "memory");
}

/* The command line of a copy: as ours, one level on. It begins like its parent, with nothing but this to tell them apart. */
static void tell_level(void)
{
    struct { uint32_t flags, memory_lower, memory_upper, boot_device, command_line; } *multiboot;
    multiboot = guest_memory(MULTIBOOT_INFORMATION, sizeof *multiboot);
    char *line = (char *)(multiboot + 1);
    multiboot->flags = 1 | 1 << 2; /* memory sizes, command line */
    multiboot->memory_lower = 640;
    multiboot->memory_upper = (uint32_t)((guest_memory_size() - 0x100000) / 1024);
    multiboot->command_line = MULTIBOOT_INFORMATION + sizeof *multiboot;
    copy(line, "level=. depth=. .... ...", 25);
    line[6] = (char)('0' + level + 1);
    line[14] = (char)('0' + depth);
    if (with_vgif)
        copy(line + 16, "vgif", 4);
    if (with_vls)
        copy(line + 21, "vls", 3);
}

void guest_start(uint64_t entry)
{
    svm_start();
    memset(io_map, 0xff, sizeof io_map);
    memset(msr_map, 0xff, sizeof msr_map);
    tell_level();
    tables_create(&guest.tables, 8);
    for (uint64_t gpa = 0; gpa < guest_memory_size(); gpa += LARGE_PAGE)
        tables_map(&guest.tables, gpa, (GUEST_START + gpa) | PRESENT | WRITABLE | USER | LARGE | ACCESSED | DIRTY, 1);

    struct vmcb *vmcb = guest.vmcb = allocate_page();
    vmcb->int_control = V_INTR_MASKING | V_IGN_TPR | (with_vgif ? V_GIF_ENABLE : 0);
    set_guest_gif(1);
    vmcb->lbr_control = with_vls ? VIRTUAL_VMLOAD_VMSAVE : 0;
    vmcb->intercept1 = INTERCEPTS1;
    vmcb->intercept2 = intercepts2(vmcb->int_control, vmcb->lbr_control);
    vmcb->iopm_base = physical(io_map);
    vmcb->msrpm_base = physical(msr_map);
    vmcb->tsc_offset = -rdtsc(); /* each level's time begins when it is started */
    vmcb->asid = 1;
    vmcb->np_enable = 1;
    vmcb->n_cr3 = physical(guest.tables.pages);
    vmcb->g_pat = 0x0007040600070406;
    vmcb->cs = (struct segment){.selector = 0x08, .attributes = 0xc9b, .limit = 0xffffffff};
    vmcb->ds = vmcb->es = vmcb->ss = (struct segment){.selector = 0x10, .attributes = 0xc93, .limit = 0xffffffff};
    vmcb->fs = vmcb->gs = vmcb->ds;
    vmcb->tr = (struct segment){.attributes = 0x8b, .limit = 0xffff};
    vmcb->ldtr = (struct segment){.attributes = 0x82, .limit = 0xffff};
    vmcb->efer = EFER_SVME;
    vmcb->cr0 = CR0_PE | CR0_ET;
    vmcb->dr6 = 0xffff0ff0;
    vmcb->dr7 = 0x400;
    vmcb->rflags = 2;
    vmcb->rip = entry;
    vmcb->rax = MULTIBOOT_MAGIC;
    guest.registers.rbx = MULTIBOOT_INFORMATION;
}

/* Bring an interrupt that the guest is to take as far as it can go before the next VMRUN. */
static void offer_interrupt(void)
{
    if (timer_expired && guest.tick_vector) {
        guest.pending = guest.tick_vector;
        guest.tick_vector = 0;
    }
    if (guest.nested && guest.pending && nest_interruptible())
        nest_exit(EXIT_INTR, 0, 0);
    if (guest.nested)
        return;
    struct vmcb *vmcb = guest.vmcb;
    vmcb->int_control &= ~V_IRQ;
    if (guest.pending && (with_vgif || guest.gif)) {
        vmcb->int_control |= V_IRQ;
        vmcb->int_vector = (uint32_t)guest.pending;
    }
}

_Noreturn void guest_run(void)
{
    timer_alone();
    __asm__ volatile("sti"); /* and so it stays: vmrun.S has GIF = 0 around its VMRUN */
    for (;;) {
        offer_interrupt();
        struct vmcb *vmcb = running();
        struct tables *tables = guest.nested ? &guest.nested->shadow : &guest.tables;
        int offered = !guest.nested && vmcb->int_control & V_IRQ;
        vmcb->tlb_control = tables->flush ? TLB_FLUSH_ALL : 0;
        tables->flush = 0;
        vmrun(physical(vmcb), &guest.registers, physical(&host_vmcb));
        if (offered && !(vmcb->int_control & V_IRQ))
            guest.pending = 0; /* it is in the guest's handler, or in EXITINTINFO on the way there */
        handle_exit();
    }
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One function a reason for #VMEXIT. EXITCODE says why, EXITINFO1 and EXITINFO2 say more (APM2 Appendix C). */
#include "exits.h"
#include "cpu.h"
#include "hypercall.h"
#include "npt.h"
#include "print.h"
#include "shadow.h"
#include "svm.h"

#define VECTOR_UD 6
#define VECTOR_GP 13
#define NO_ERROR_CODE (~0ull)
#define RFLAGS_IF (1ull << 9)

/* Step over an instruction that has been emulated. An intercept comes before the instruction has any effect, so RIP
   still points at it. `length`: for processors that do not save the next RIP. */
static void skip(struct guest *guest, unsigned length)
{
    struct vmcb *vmcb = guest->vmcb;
    vmcb->rip = has_next_rip ? vmcb->next_rip : vmcb->rip + length;
    vmcb->int_shadow &= ~1ull; /* the shadow of an STI covers one instruction, and that was this one */
}

/* Let the guest find an exception at its next VMRUN (APM2 15.20). */
static void inject(struct guest *guest, unsigned vector, uint64_t error)
{
    guest->vmcb->event_inject = EVENT_VALID | EVENT_EXCEPTION | vector;
    if (error != NO_ERROR_CODE)
        guest->vmcb->event_inject |= EVENT_ERROR_VALID | error << 32;
}

static void on_cpuid(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    uint32_t leaf = (uint32_t)vmcb->rax;
    struct cpuid r = cpuid(leaf, (uint32_t)guest->registers.rcx);
    if (leaf == 1)
        r.ecx |= 1u << 31; /* "there is a hypervisor" */
    else if (leaf == 0x40000000)
        r = (struct cpuid){0x40000000, 0x63616554, 0x676e6968, 0x204d5653}; /* "Teaching" "SVM " */
    else if (leaf == 0x80000001)
        r.ecx &= ~(1u << 2); /* no SVM inside the guest */
    else if (leaf == 0x8000000a)
        r = (struct cpuid){0};
    vmcb->rax = r.eax;
    guest->registers.rbx = r.ebx;
    guest->registers.rcx = r.ecx;
    guest->registers.rdx = r.edx;
    skip(guest, 2);
}

static void on_io(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    uint64_t info = vmcb->exit_info1; /* APM2 15.10.2: bit 0 IN, 2 string, 6:4 size, 31:16 port */
    uint16_t port = (uint16_t)(info >> 16);
    unsigned bits = 8 * (info >> 4 & 7);
    if (info & 1 << 2) {
        guest_stop(guest, "it uses INS or OUTS, which this hypervisor does not emulate");
        return;
    }
    if (info & 1) {
        uint64_t mask = (1ull << bits) - 1;
        uint64_t value = port == 0x3fd ? 0x60 : mask; /* "transmitter empty", or nobody there */
        vmcb->rax = bits == 32 ? value : (vmcb->rax & ~mask) | value;
    } else if (port == 0x3f8 || port == 0xe9) {
        guest_put(guest, (char)vmcb->rax);
    }
    vmcb->rip = vmcb->exit_info2; /* an IOIO exit says itself where the next instruction is */
    vmcb->int_shadow &= ~1ull;
}

/* Returns 0 for an MSR, or a value, that calls for #GP. */
static int read_msr(struct guest *guest, uint32_t msr, uint64_t *value)
{
    switch (msr) {
    case MSR_EFER:
        *value = guest->vmcb->efer & ~EFER_SVME;
        return 1;
    case MSR_PAT:
        *value = guest->vmcb->g_pat;
        return 1;
    case MSR_GUEST_NUMBER:
        *value = guest->number;
        return 1;
    }
    return 0;
}

static int write_msr(struct guest *guest, uint32_t msr, uint64_t value)
{
    struct vmcb *vmcb = guest->vmcb;
    if (msr != MSR_EFER || value & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE))
        return 0;
    if (vmcb->cr0 & CR0_PG && (value ^ vmcb->efer) & EFER_LME)
        return 0; /* LME is fixed while paging is on (APM2 3.1.7) */
    /* LMA belongs to the processor, which sets it when paging comes on; SVME must stay set, or VMRUN refuses. */
    vmcb->efer = (value & ~EFER_LMA) | (vmcb->efer & EFER_LMA) | EFER_SVME;
    return 1;
}

static void on_msr(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    uint32_t msr = (uint32_t)guest->registers.rcx;
    uint64_t value = guest->registers.rdx << 32 | (uint32_t)vmcb->rax;
    if (vmcb->exit_info1 ? !write_msr(guest, msr, value) : !read_msr(guest, msr, &value)) {
        inject(guest, VECTOR_GP, 0);
        return;
    }
    if (!vmcb->exit_info1) {
        vmcb->rax = (uint32_t)value;
        guest->registers.rdx = value >> 32;
    }
    skip(guest, 2);
}

static int on_halt(struct guest *guest)
{
    skip(guest, 1);
    if (!(guest->vmcb->rflags & RFLAGS_IF))
        guest_stop(guest, "it halted with interrupts off");
    else if (!guest->timer_vector)
        guest_stop(guest, "it halted without a timer to wake it");
    else if (!(guest->vmcb->int_control & V_IRQ)) /* with an interrupt waiting, HLT is over at once */
        guest->state = HALTED;
    return 1;
}

static uint64_t print_from_guest(struct guest *guest, uint64_t gpa, uint64_t length)
{
    if (length > 4096 || gpa > NO_PAGE - length)
        return NO_PAGE;
    for (; length; length--, gpa++) {
        uint64_t spa = guest_to_system(guest, gpa);
        if (spa == NO_PAGE)
            return NO_PAGE;
        guest_put(guest, *(const char *)spa);
    }
    return 0;
}

static int on_hypercall(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    if (vmcb->cpl) {
        inject(guest, VECTOR_UD, NO_ERROR_CODE);
        return 0;
    }
    uint64_t number = vmcb->rax, first = guest->registers.rbx, second = guest->registers.rcx;
    int turn = 0;
    vmcb->rax = 0;
    switch (number) {
    case HYPERCALL_PRINT:
        vmcb->rax = print_from_guest(guest, first, second);
        break;
    case HYPERCALL_YIELD:
        turn = 1;
        break;
    case HYPERCALL_DONE:
        if (first) {
            guest_stop(guest, "it reports a failure");
        } else {
            guest_flush(guest);
            guest->state = FINISHED;
        }
        break;
    case HYPERCALL_TIMER:
        if (first > 255 || (first && first < 32))
            vmcb->rax = NO_PAGE;
        else
            guest->timer_vector = first;
        break;
    case HYPERCALL_RELEASE:
        vmcb->rax = npt_release(guest, first) ? 0 : NO_PAGE;
        break;
    default:
        vmcb->rax = NO_PAGE;
    }
    skip(guest, 3);
    return turn;
}

static void on_nested_page_fault(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    uint64_t error = vmcb->exit_info1, gpa = vmcb->exit_info2; /* APM2 15.25.6 */
    if (!(error & 1) && npt_fill(guest, gpa))
        return; /* the instruction runs again and finds its page */
    guest_flush(guest);
    print("hypervisor: guest %u: nested page fault (#NPF), EXITINFO1 %x: a %s at gpa %x, %s, %s\n", guest->number, error,
          error & 1 << 4 ? "code fetch" : error & 1 << 1 ? "write" : "read", gpa,
          error & 1 ? "page present but access not allowed" : "no such page",
          error & 1ull << 33 ? "by a walk of the guest's own page table" : "by the guest's own access");
    print("  its memory is gpa 0 to %x; rip %x, cr3 %x, cr0 %x; nested walk:\n", guest->kind->size - 1, vmcb->rip, vmcb->cr3,
          vmcb->cr0);
    npt_show(guest, gpa);
    guest_stop(guest, "it touched memory that is not its own");
}

static void on_page_fault(struct guest *guest)
{
    /* Only paged real mode asks for this intercept. CR2 is not written by an intercepted #PF: the address is in EXITINFO2. */
    uint64_t error = guest->vmcb->exit_info1, linear = guest->vmcb->exit_info2;
    if (!(error & 1) && shadow_fill(guest, linear))
        return;
    guest_flush(guest);
    print("hypervisor: guest %u: #PF, error code %x, at linear address %x\n", guest->number, error, linear);
    guest_stop(guest, "it touched memory that is not its own");
}

/* Intercepted MOV to and from CR0: the guest shall see real mode as it always was, without our PG bit. */
static void on_cr0(struct guest *guest, int write)
{
    struct vmcb *vmcb = guest->vmcb;
    struct registers *r = &guest->registers;
    uint64_t *gpr[8] = {&vmcb->rax, &r->rcx, &r->rdx, &r->rbx, &vmcb->rsp, &r->rbp, &r->rsi, &r->rdi};
    uint8_t code[3];
    for (unsigned i = 0; i < sizeof code; i++) {
        uint64_t spa = guest_to_system(guest, vmcb->cs.base + (uint16_t)(vmcb->rip + i));
        code[i] = spa == NO_PAGE ? 0 : *(const uint8_t *)spa;
    }
    /* 0F 20 /r: MOV r32, CRn. 0F 22 /r: MOV CRn, r32. ModRM 5:3 is n, 2:0 the register; MOD counts for nothing. */
    uint64_t *operand = gpr[code[2] & 7];
    if (code[0] != 0x0f || code[1] != (write ? 0x22 : 0x20)) {
        guest_stop(guest, "it accesses CR0 in a way that is not emulated (LMSW, SMSW, a prefix)");
    } else if (!write) {
        *operand = (uint32_t)(vmcb->cr0 & ~CR0_PG);
        skip(guest, 3);
    } else if (*operand & (CR0_PE | CR0_PG)) {
        guest_stop(guest, "it wants protected mode, which this hypervisor gives only at the start");
    } else {
        vmcb->cr0 = (uint32_t)*operand | CR0_ET | CR0_PG;
        skip(guest, 3);
    }
}

static const struct { uint64_t code; enum reason reason; } reasons[] = {
    {EXIT_INTR, BY_INTR}, {EXIT_CPUID, BY_CPUID}, {EXIT_IOIO, BY_IOIO},     {EXIT_MSR, BY_MSR},        {EXIT_HLT, BY_HLT},
    {EXIT_VMMCALL, BY_VMMCALL}, {EXIT_NPF, BY_NPF}, {EXIT_PF, BY_PF}, {EXIT_CR0_READ, BY_CR0}, {EXIT_CR0_WRITE, BY_CR0},
};

static void count(struct guest *guest)
{
    for (unsigned i = 0; i < sizeof reasons / sizeof *reasons; i++) {
        if (reasons[i].code == guest->vmcb->exit_code) {
            guest->exits[reasons[i].reason]++;
            return;
        }
    }
    guest->exits[BY_OTHER]++;
}

int handle_exit(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    count(guest);

    /* An exit in the middle of an event's delivery (a #NPF on the stack it is pushed to, say) leaves the event here, and
       it is ours to deliver it again. Not so INT n: RIP points at it, and it simply runs again (APM2 15.7.2). */
    vmcb->event_inject = 0;
    if (vmcb->exit_int_info & EVENT_VALID && (vmcb->exit_int_info & EVENT_TYPE(7)) != EVENT_SOFTWARE)
        vmcb->event_inject = vmcb->exit_int_info;

    switch (vmcb->exit_code) {
    case EXIT_INTR: /* STGI in vmrun.S has let our own handler see to it */
    case EXIT_NMI:
        return 0;
    case EXIT_CPUID:
        on_cpuid(guest);
        return 0;
    case EXIT_IOIO:
        on_io(guest);
        return 0;
    case EXIT_MSR:
        on_msr(guest);
        return 0;
    case EXIT_HLT:
        return on_halt(guest);
    case EXIT_VMMCALL:
        return on_hypercall(guest);
    case EXIT_NPF:
        on_nested_page_fault(guest);
        return 0;
    case EXIT_PF:
        on_page_fault(guest);
        return 0;
    case EXIT_CR0_READ:
        on_cr0(guest, 0);
        return 0;
    case EXIT_CR0_WRITE:
        on_cr0(guest, 1);
        return 0;
    case EXIT_INVD: /* caches are not the guest's to throw away */
    case EXIT_WBINVD:
        skip(guest, 2);
        return 0;
    case EXIT_VMRUN:
    case EXIT_VMLOAD: /* CPUID told the guest that it has none of these */
    case EXIT_VMSAVE:
    case EXIT_STGI:
    case EXIT_CLGI:
    case EXIT_SKINIT:
    case EXIT_INVLPGA:
    case EXIT_MONITOR:
    case EXIT_MWAIT:
        inject(guest, VECTOR_UD, NO_ERROR_CODE);
        return 0;
    case EXIT_SHUTDOWN:
        print("hypervisor: guest %u: triple fault; its registers are undefined now (APM2 15.14.3)\n", guest->number);
        guest_stop(guest, "it shut down");
        return 0;
    case EXIT_INVALID:
        fatal("VMRUN refused a VMCB: see APM2 15.5.1 for what it checks");
    default:
        print("hypervisor: guest %u: no handler for EXITCODE %x, EXITINFO1 %x, EXITINFO2 %x, rip %x\n", guest->number,
              vmcb->exit_code, vmcb->exit_info1, vmcb->exit_info2, vmcb->rip);
        guest_stop(guest, "its exit is not handled");
        return 0;
    }
}

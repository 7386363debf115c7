/* The common world switch in C: VMRUN, #VMEXIT, VMLOAD and VMSAVE where nobody has to look; and the two instructions that an
 * operating system on the bare machine stops for most, RDTSC(P) and MOV to CR3.
 *
 * The rules are in world.py, which is also the twin of what is here: it enters a VMCB first, judges it, and leaves an
 * entry with what follows from its control area.  While every field that the judgement read stays the same, VMRUN takes
 * that entry.  Whatever is out of the common (an event to inject, V_IRQ, a changed control area, a page that somebody
 * watches) is left to Python by returning -1, before anything is changed.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "../engine/offsets.h"
#include "../engine/runtime.h"

enum { ENTRIES = 64, JUDGED = 64 };
enum { PAGE = 4096, FREE = 1 };

/* Declared once more in switch.py, by ctypes; the sizes are compared. */
struct record {                         /* of ring.py */
    uint64_t number, cpu, vmcb, time, rip, code, info1, info2, intinfo, host_rip, entered, resumed, rax, rcx;
    uint8_t insn[15], form;
};
struct ring { uint64_t count, next, capacity; struct record *records; uint64_t limit; };
enum { CONTROL_SIZE = 0x148, SAVE_AREA = 0x400, SAVE_SIZE = 0x2f0 };
struct image { uint64_t vmcb, time, number, rip, cpu; uint8_t control[CONTROL_SIZE], save[SAVE_SIZE], end[32]; };  /* images.py */
struct images { uint64_t count, next, capacity; struct image *images; };
struct crossing { uint64_t host_rip, entered; struct record *last; uint64_t last_number; };

struct entry {                          /* a VMCB that VMRUN has accepted */
    uint64_t vmcb;                      /* spa, or FREE */
    uint64_t judged[JUDGED];            /* the judged fields as they were */
    uint64_t host_cr0, host_cr4, host_efer;
    uint64_t root;                      /* of the engine's table */
    uint64_t iopm, msrpm;               /* permission maps */
    uint64_t *registers;                /* the vCPU's general registers at its last #VMEXIT */
    struct ring *ring;                  /* the exits of its guest */
    struct images *images;              /* what its VMCBs were at VMRUN and #VMEXIT; NULL if not kept */
    uint32_t words[6];                  /* intercepts */
    uint8_t intercepts[24];             /* what the engine is to stop at for them */
};

struct switcher {                       /* of one CPU */
    uint8_t *ram;                       /* address of system-physical 0 */
    uint8_t *pages;                     /* a byte of state for each page */
    uint64_t ranges[4];                 /* RAM: first, end, first, end */
    uint64_t *total;                    /* #VMEXITs of the machine */
    uint64_t busy;                      /* bits of a page's state with which Python must hear of stores */
    uint64_t cpu;
    uint64_t host_root;
    uint64_t physical_mask;             /* bits of a physical address that must be 0 */
    uint64_t deadline;                  /* guest time at which the run's budget is used up */
    uint64_t tsc_offset;                /* of the CPU: the time stamp counter less guest time */
    uint64_t dr[8];                     /* the debug registers as software sees them */
    /* Of the guest that runs: */
    uint64_t v_intr, eventinj, host_pat;
    int32_t inside;                     /* its entry; -1 for the host, -2 for a guest without one */
    uint32_t host_if;                   /* RFLAGS.IF at VMRUN */
    uint64_t switches;                  /* VMRUNs and #VMEXITs ever made here */
    uint64_t judged_count;
    uint32_t judged_index[JUDGED];      /* qword of the VMCB */
    uint64_t judged_mask[JUDGED];
    uint32_t watched[6];        /* exit codes that somebody waits for: Python's */
    uint8_t host_intercepts[24];
    struct crossing crossing;   /* the last VMRUN, and the last #VMEXIT */
    struct fingerprint *fingerprint;    /* NULL: nobody wants one */
    struct entry entries[ENTRIES];
};

/* Offsets in a uc_context, then in a VMCB: from engine/layout.py and introspect/vmcb.py. */
static struct {
    uint32_t regs, eip, eflags, hflags, hflags2, segments, cr, efer, pat, vm_hsave, sysenter_cs, lstar, tsc_aux, intercept,
        nested_cr3, code_base;
} at;
static struct {
    uint32_t es, fs, gdtr, ldtr, idtr, tr, cpl, efer, controls, rsp, rax, msrs, cr2, g_pat, v_intr, int_state, exitcode,
        eventinj, nrip, insn_len, misc_ctl2;
} in;

enum { ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR };
enum { HF_INHIBIT_IRQ = 1 << 3, HF_CS32 = 1 << 4, HF_SS32 = 1 << 5, HF_ADDSEG = 1 << 6, HF_LMA = 1 << 14, HF_CS64 = 1 << 15,
       HF_SVME = 1 << 20, HF_GUEST = 1 << 21, HF_OSFXSR = 1 << 22, HF_SMAP = 1 << 23, HF_IOBPT = 1 << 24,
       HF_AM = 1 << 27, HF_XM = 1 << 28 };
enum { HF2_GIF = 1 };
enum { RFLAGS_TF = 1 << 8, RFLAGS_IF = 1 << 9, RFLAGS_RF = 1 << 16, RFLAGS_VM = 1 << 17 };
#define RFLAGS_DEFINED 0x3f7fd5ull
#define CR0_DEFINED 0xe005003full
enum { CR0_ET = 1 << 4, CR0_AM = 1 << 18 };
#define DR6(value) (((value) & 0xe00f) | 0xffff0ff0)
#define DR7(value) (((value) & 0xffff23ff) | 0x400)
enum { DR7_ENABLED = 0xff };
enum { V_VMLOAD_VMSAVE = 1 << 1 };                       /* in misc_ctl2 */
enum { EFER_LME = 1 << 8, EFER_LMA = 1 << 10, EFER_SVME = 1 << 12 };
enum { CR4_OSFXSR = 1 << 9, CR4_SMAP = 1 << 21 };
enum { ATTRIB_L = 1 << 9, ATTRIB_DB = 1 << 10 };        /* in a VMCB */
enum { SEG_L = 1 << 21, SEG_DB = 1 << 22 };             /* in the engine's form */
enum { CODE_BASE_KEPT = 1 << 0 };                       /* of state.py */
enum { CR3_WRITE = 0x13, RDTSC = 0x6e, CPUID = 0x72, HLT = 0x78, IOIO = 0x7b, MSR = 0x7c, VMRUN = 0x80, VMLOAD = 0x82,
       VMSAVE = 0x83, SKINIT = 0x86 };
enum { IO_IN = 1 << 0, IO_SIZE = 1 << 4, IO_A16 = 1 << 7, IO_A32 = 1 << 8, IO_A64 = 1 << 9, IO_SEGMENT = 1 << 10 };
#define EVENTINJ_V (1ull << 31)

struct segment { uint16_t selector, attrib; uint32_t limit; uint64_t base; };           /* in a VMCB */
struct hidden { uint32_t selector, pad; uint64_t base; uint32_t limit, flags; };        /* in the engine */

#define HIDDEN(rt) ((struct hidden *)((char *)(rt)->context + at.segments))
#define Q(page, offset) (*(uint64_t *)((uint8_t *)(page) + (offset)))
#define REG(rt, number) FIELD(rt, uint64_t, at.regs + 8 * (number))
#define CR(rt, number) FIELD(rt, uint64_t, at.cr + 8 * (number))

/* Whether an aligned page is one of memory, whose ranges are whole pages. */
static bool in_ram(const struct switcher *sw, uint64_t page)
{
    return (page >= sw->ranges[0] && page < sw->ranges[1]) || (page >= sw->ranges[2] && page < sw->ranges[3]);
}

/* The page that rAX names, NULL unless it is one of memory; `stored`: and none whose stores Python must hear of. */
static uint8_t *operand(struct runtime *rt, const struct switcher *sw, bool stored, uint64_t *spa)
{
    uint32_t hflags = FIELD(rt, uint32_t, at.hflags);
    uint64_t address = REG(rt, 0);
    if (!(hflags & HF_CS64))
        address &= hflags & HF_CS32 ? 0xffffffff : 0xffff;
    if (address & (PAGE - 1) || address & sw->physical_mask || !in_ram(sw, address))
        return NULL;
    if (stored && sw->pages[address / PAGE] & sw->busy)
        return NULL;
    *spa = address;
    return sw->ram + address;
}

/* Where the host's state goes. */
static uint8_t *save_area(struct runtime *rt, const struct switcher *sw)
{
    uint64_t address = FIELD(rt, uint64_t, at.vm_hsave) & ~(uint64_t)(PAGE - 1);
    return in_ram(sw, address) ? sw->ram + address : NULL;
}

static void to_vmcb(struct segment *to, const struct hidden *of)
{
    to->selector = (uint16_t)of->selector;
    to->attrib = (of->flags >> 8 & 0xff) | (of->flags >> 12 & 0xf00);
    to->limit = of->limit;
    to->base = of->base;
}

static uint64_t canonical(uint64_t address)
{
    return (uint64_t)((int64_t)(address << 16) >> 16);
}

/* `wide`: of FS, GS, LDTR and TR; the others' bases have 32 bits. */
static void from_vmcb(struct hidden *to, const struct segment *of, bool wide)
{
    to->selector = of->selector;
    to->base = wide ? canonical(of->base) : (uint32_t)of->base;
    to->limit = of->limit;
    to->flags = (uint32_t)(of->attrib & 0xff) << 8 | (uint32_t)(of->attrib & 0xf00) << 12;
}

/* CR4 CR3 CR0 DR7 DR6 RFLAGS RIP lie side by side. */
static void store_state(struct runtime *rt, struct switcher *sw, uint8_t *to)
{
    struct hidden *hidden = HIDDEN(rt);
    uint64_t *controls = (uint64_t *)(to + in.controls);
    for (int i = ES; i <= DS; i++)
        to_vmcb((struct segment *)(to + in.es) + i, hidden + i);
    if (!hidden[CS].base && hidden[CS].flags & CODE_BASE_KEPT)
        ((struct segment *)(to + in.es))[CS].base = FIELD(rt, uint64_t, at.code_base);
    *(uint32_t *)(to + in.gdtr + 4) = hidden[GDTR].limit;
    Q(to, in.gdtr + 8) = hidden[GDTR].base;
    *(uint32_t *)(to + in.idtr + 4) = hidden[IDTR].limit;
    Q(to, in.idtr + 8) = hidden[IDTR].base;
    to[in.cpl] = FIELD(rt, uint32_t, at.hflags) & 3;
    Q(to, in.efer) = FIELD(rt, uint64_t, at.efer);
    controls[0] = CR(rt, 4);
    controls[1] = CR(rt, 3);
    controls[2] = CR(rt, 0);
    controls[3] = sw->dr[7];
    controls[4] = sw->dr[6];
    controls[5] = FIELD(rt, uint64_t, at.eflags) | 2;
    controls[6] = FIELD(rt, uint64_t, at.eip);
    Q(to, in.rsp) = REG(rt, 4);
    Q(to, in.rax) = REG(rt, 0);
}

static void load_state(struct runtime *rt, const uint8_t *of)
{
    struct hidden *hidden = HIDDEN(rt);
    const uint64_t *controls = (const uint64_t *)(of + in.controls);
    for (int i = ES; i <= DS; i++)
        from_vmcb(hidden + i, (const struct segment *)(of + in.es) + i, false);
    hidden[GDTR].limit = *(const uint16_t *)(of + in.gdtr + 4);
    hidden[GDTR].base = canonical(Q(of, in.gdtr + 8));
    hidden[IDTR].limit = *(const uint16_t *)(of + in.idtr + 4);
    hidden[IDTR].base = canonical(Q(of, in.idtr + 8));
    FIELD(rt, uint64_t, at.efer) = Q(of, in.efer);
    CR(rt, 4) = controls[0];
    CR(rt, 3) = Q(of, in.efer) & EFER_LME && controls[2] >> 31 & 1 ? controls[1] : (uint32_t)controls[1];
    CR(rt, 0) = (controls[2] & CR0_DEFINED) | CR0_ET;
    FIELD(rt, uint64_t, at.eflags) = (controls[5] & RFLAGS_DEFINED) | 2;
    FIELD(rt, uint64_t, at.eip) = controls[6];
    REG(rt, 4) = Q(of, in.rsp);
    REG(rt, 0) = Q(of, in.rax);
}

/* CpuState.refresh(): the engine's mode flags. */
static void refresh(struct runtime *rt, uint32_t cpl, bool shadow)
{
    struct hidden *hidden = HIDDEN(rt);
    uint64_t cr0 = CR(rt, 0), cr4 = CR(rt, 4), efer = FIELD(rt, uint64_t, at.efer);
    uint32_t cs = hidden[CS].flags, flags = HF_GUEST | HF_IOBPT | cpl | (FIELD(rt, uint32_t, at.hflags) & HF_XM);
    if (shadow)
        flags |= HF_INHIBIT_IRQ;
    if (cr0 & CR0_AM)
        flags |= HF_AM;
    flags |= (uint32_t)(cr0 & 1) << 7 | (uint32_t)(cr0 & 0xe) << 8;
    if (efer & EFER_LMA)
        flags |= HF_LMA;
    if (efer & EFER_SVME)
        flags |= HF_SVME;
    if (cr4 & CR4_OSFXSR)
        flags |= HF_OSFXSR;
    if (cr4 & CR4_SMAP)
        flags |= HF_SMAP;
    if (efer & EFER_LMA && cs & SEG_L) {
        flags |= HF_CS32 | HF_SS32 | HF_CS64;
        if (hidden[CS].base) {
            FIELD(rt, uint64_t, at.code_base) = hidden[CS].base;
            hidden[CS].base = 0;
            hidden[CS].flags = cs | CODE_BASE_KEPT;
        }
    } else {
        if (cs & SEG_DB)
            flags |= HF_CS32;
        if (hidden[SS].flags & SEG_DB)
            flags |= HF_SS32;
        if (!(cr0 & 1) || FIELD(rt, uint64_t, at.eflags) & RFLAGS_VM || !(cs & SEG_DB) ||
            (hidden[DS].base | hidden[ES].base | hidden[SS].base))
            flags |= HF_ADDSEG;
    }
    FIELD(rt, uint32_t, at.hflags) = flags;
}

static void gif(struct runtime *rt, bool value)
{
    uint32_t flags = FIELD(rt, uint32_t, at.hflags2) & ~(uint32_t)HF2_GIF;
    FIELD(rt, uint32_t, at.hflags2) = flags | (value ? HF2_GIF : 0);
}

/* Cpu.advance() where neither TF nor RF is set. */
static bool plain(struct runtime *rt)
{
    return !(FIELD(rt, uint64_t, at.eflags) & (RFLAGS_TF | RFLAGS_RF));
}

static void advance(struct runtime *rt, uint32_t length)
{
    uint32_t flags = FIELD(rt, uint32_t, at.hflags);
    uint64_t rip = FIELD(rt, uint64_t, at.eip) + length;
    FIELD(rt, uint64_t, at.eip) = flags & HF_CS64 ? rip : (uint32_t)rip;
    FIELD(rt, uint32_t, at.hflags) = flags & ~(uint32_t)HF_INHIBIT_IRQ;
}

static struct entry *entry_of(struct switcher *sw, uint64_t vmcb)
{
    return &sw->entries[vmcb / PAGE % ENTRIES];
}

/* Images.add() */
static void keep_image(const struct switcher *sw, const struct entry *e, uint64_t time, uint64_t number, uint64_t rip)
{
    const uint8_t *vmcb = sw->ram + e->vmcb;
    struct images *all = e->images;
    struct image *i = all->images + all->next;
    all->count++;
    all->next = all->next + 1 == all->capacity ? 0 : all->next + 1;
    i->vmcb = e->vmcb, i->time = time, i->number = number, i->rip = rip, i->cpu = sw->cpu;
    memcpy(i->control, vmcb, CONTROL_SIZE);
    memcpy(i->save, vmcb + SAVE_AREA, SAVE_SIZE);
}

/* Crossing.enter() */
static void crossed(struct runtime *rt, struct switcher *sw)
{
    struct crossing *c = &sw->crossing;
    c->host_rip = FIELD(rt, uint64_t, at.eip);
    c->entered = sw->deadline - (uint64_t)rt->budget + 3;
    if (c->last && c->last->number == c->last_number)
        c->last->resumed = c->entered;
}

static int64_t vmrun(struct runtime *rt, struct switcher *sw)
{
    uint64_t spa;
    uint8_t *vmcb = operand(rt, sw, false, &spa), *host = save_area(rt, sw);
    struct entry *e;
    uint64_t cr0, efer;
    uint32_t cpl;
    if (!vmcb || !host || vmcb == host || !plain(rt))
        return -1;
    e = entry_of(sw, spa);
    if (((uint64_t *)(vmcb + in.controls))[3] & DR7_ENABLED)    /* breakpoints of the guest's own */
        return -1;
    /* Its entry is that of a host in 64-bit mode, the only one whose guests have virtual VMLOADs (APM2 15.33.1). */
    if (Q(vmcb, in.misc_ctl2) & V_VMLOAD_VMSAVE && !(FIELD(rt, uint32_t, at.hflags) & HF_CS64))
        return -1;
    if (e->vmcb != spa || e->host_cr0 != CR(rt, 0) || e->host_cr4 != CR(rt, 4) || e->host_efer != FIELD(rt, uint64_t, at.efer))
        return -1;
    for (uint32_t i = 0; i < sw->judged_count; i++)
        if ((Q(vmcb, 8 * sw->judged_index[i]) ^ e->judged[i]) & sw->judged_mask[i])
            return -1;
    crossed(rt, sw);
    if (sw->fingerprint) {
        uint64_t words[] = {FP_VMRUN, sw->cpu, spa, sw->crossing.entered, sw->crossing.host_rip};
        sw->fingerprint->switches = fp_chain(sw->fingerprint->switches, words, sizeof words / sizeof *words);
    }
    if (e->images)
        keep_image(sw, e, sw->crossing.entered, 0, sw->crossing.host_rip);
    advance(rt, 3);
    sw->host_if = (FIELD(rt, uint64_t, at.eflags) & RFLAGS_IF) != 0;
    store_state(rt, sw, host);
    load_state(rt, vmcb);
    sw->dr[7] = DR7(((uint64_t *)(vmcb + in.controls))[3]);
    sw->dr[6] = DR6(((uint64_t *)(vmcb + in.controls))[4]);
    CR(rt, 2) = Q(vmcb, in.cr2);
    cr0 = CR(rt, 0);
    cpl = !(cr0 & 1) ? 0 : FIELD(rt, uint64_t, at.eflags) & RFLAGS_VM ? 3 : vmcb[in.cpl] & 3;
    efer = FIELD(rt, uint64_t, at.efer);
    FIELD(rt, uint64_t, at.efer) = efer & EFER_LME && cr0 >> 31 ? efer | EFER_LMA : efer & ~(uint64_t)EFER_LMA;
    refresh(rt, cpl, Q(vmcb, in.int_state) & 1);
    FIELD(rt, uint64_t, at.nested_cr3) = e->root;
    sw->host_pat = FIELD(rt, uint64_t, at.pat);
    FIELD(rt, uint64_t, at.pat) = Q(vmcb, in.g_pat);
    memcpy((char *)rt->context + at.intercept, e->intercepts, 20);
    gif(rt, true);
    rt->flush = FLUSH | FORGET;
    sw->v_intr = Q(vmcb, in.v_intr);
    sw->eventinj = Q(vmcb, in.eventinj);
    sw->inside = (int32_t)(e - sw->entries);
    sw->switches++;
    return 3;
}

static void record(struct runtime *rt, struct switcher *sw, struct entry *e, uint64_t code, uint64_t info1, uint64_t info2)
{
    struct ring *ring = e->ring;
    struct crossing *c = &sw->crossing;
    uint64_t number = ++*sw->total;
    ring->count++;
    c->last = NULL;
    if (ring->capacity) {
        struct record *r = ring->records + ring->next;
        uint32_t hflags = FIELD(rt, uint32_t, at.hflags);
        ring->next = ring->next + 1 == ring->capacity ? 0 : ring->next + 1;
        *r = (struct record){
            .number = number, .cpu = sw->cpu, .vmcb = e->vmcb, .time = sw->deadline - (uint64_t)rt->budget,
            .rip = FIELD(rt, uint64_t, at.eip), .code = code, .info1 = info1, .info2 = info2,
            .host_rip = c->host_rip, .entered = c->entered, .rax = REG(rt, 0), .rcx = REG(rt, 1),
        };
        memcpy(r->insn, rt->code, sizeof r->insn);
        if (rt->code_size < sizeof r->insn)
            memset(r->insn + rt->code_size, 0, sizeof r->insn - rt->code_size);
        r->form = (uint8_t)(rt->code_size | (hflags & HF_CS64 ? 2 : hflags & HF_CS32 ? 1 : 0) << 4);
        c->last = r;
    }
    c->last_number = number;
    memcpy(e->registers, &REG(rt, 0), 128);
    if (sw->fingerprint) {
        uint64_t words[] = {FP_VMEXIT, sw->cpu, e->vmcb, sw->deadline - (uint64_t)rt->budget, FIELD(rt, uint64_t, at.eip), code,
                            info1, info2, 0};
        uint64_t state = fp_chain(sw->fingerprint->switches, words, sizeof words / sizeof *words);
        sw->fingerprint->switches = fp_chain(state, e->registers, 16);
    }
}

/* Whether a host save area still holds what VMRUN stored there: #VMEXIT has to judge nothing then (APM2 15.6). */
static bool host_is_sound(const struct switcher *sw, const struct entry *e, const uint8_t *host)
{
    const uint64_t *controls = (const uint64_t *)(host + in.controls);
    return controls[0] == e->host_cr4 && !(controls[1] & sw->physical_mask) && controls[2] == e->host_cr0 &&
           Q(host, in.efer) == e->host_efer &&
           (((const struct segment *)(host + in.es))[CS].attrib & (ATTRIB_L | ATTRIB_DB)) != (ATTRIB_L | ATTRIB_DB);
}

static int64_t vmexit(struct runtime *rt, struct switcher *sw, uint32_t code, uint64_t info1, uint64_t info2, uint64_t nrip)
{
    struct entry *e = &sw->entries[sw->inside];
    uint8_t *vmcb = sw->ram + e->vmcb, *host = save_area(rt, sw);
    uint64_t state, rip = FIELD(rt, uint64_t, at.eip);
    if (e->vmcb == FREE || !host || !host_is_sound(sw, e, host) || sw->pages[e->vmcb / PAGE] & sw->busy ||
        ((uint64_t *)(host + in.controls))[5] & RFLAGS_TF)
        return -1;
    if (e->ring->count >= e->ring->limit)       /* somebody wants them all, and has to take some first */
        return -1;
    record(rt, sw, e, code, info1, info2);
    store_state(rt, sw, vmcb);
    Q(vmcb, in.cr2) = CR(rt, 2);
    Q(vmcb, in.g_pat) = FIELD(rt, uint64_t, at.pat);
    FIELD(rt, uint64_t, at.pat) = sw->host_pat;
    Q(vmcb, in.v_intr) = sw->v_intr;
    state = Q(vmcb, in.int_state) & ~1ull;
    Q(vmcb, in.int_state) = state | (FIELD(rt, uint32_t, at.hflags) & HF_INHIBIT_IRQ ? 1 : 0);
    Q(vmcb, in.eventinj) = sw->eventinj & ~EVENTINJ_V;
    Q(vmcb, in.nrip) = nrip;
    vmcb[in.insn_len] = 0;
    Q(vmcb, in.exitcode) = code;
    Q(vmcb, in.exitcode + 8) = info1;
    Q(vmcb, in.exitcode + 16) = info2;
    Q(vmcb, in.exitcode + 24) = 0;
    load_state(rt, host);
    CR(rt, 0) |= 1;
    FIELD(rt, uint64_t, at.eflags) &= ~(uint64_t)RFLAGS_VM;
    sw->dr[7] = 0x400;
    refresh(rt, 0, false);
    FIELD(rt, uint64_t, at.nested_cr3) = sw->host_root;
    memcpy((char *)rt->context + at.intercept, sw->host_intercepts, 20);
    gif(rt, false);
    rt->flush = FLUSH | FORGET;
    sw->inside = -1;
    sw->switches++;
    if (e->images)
        keep_image(sw, e, sw->deadline - (uint64_t)rt->budget, sw->crossing.last_number, rip);
    return 0;
}

static int64_t vmload(struct runtime *rt, struct switcher *sw)
{
    uint64_t spa;
    const uint8_t *of = operand(rt, sw, false, &spa);
    struct hidden *hidden = HIDDEN(rt);
    const uint64_t *msrs;
    uint64_t *sysenter = &FIELD(rt, uint64_t, at.sysenter_cs), *syscall = &FIELD(rt, uint64_t, at.lstar);
    if (!of || !plain(rt))
        return -1;
    msrs = (const uint64_t *)(of + in.msrs);
    from_vmcb(hidden + FS, (const struct segment *)(of + in.fs), true);
    from_vmcb(hidden + GS, (const struct segment *)(of + in.fs) + 1, true);
    from_vmcb(hidden + LDTR, (const struct segment *)(of + in.ldtr), true);
    from_vmcb(hidden + TR, (const struct segment *)(of + in.tr), true);
    /* STAR LSTAR CSTAR SFMASK KERNEL_GS_BASE SYSENTER_CS SYSENTER_ESP SYSENTER_EIP */
    sysenter[0] = (uint32_t)msrs[5];
    sysenter[1] = msrs[6];
    sysenter[2] = msrs[7];
    sysenter[3] = msrs[0];
    memcpy(syscall, msrs + 1, 24);
    syscall[3] = canonical(msrs[4]);
    advance(rt, 3);
    return 3;
}

static int64_t vmsave(struct runtime *rt, struct switcher *sw)
{
    uint64_t spa;
    uint8_t *to = operand(rt, sw, true, &spa);
    struct hidden *hidden = HIDDEN(rt);
    uint64_t *msrs;
    const uint64_t *sysenter = &FIELD(rt, uint64_t, at.sysenter_cs), *syscall = &FIELD(rt, uint64_t, at.lstar);
    if (!to || !plain(rt))
        return -1;
    msrs = (uint64_t *)(to + in.msrs);
    to_vmcb((struct segment *)(to + in.fs), hidden + FS);
    to_vmcb((struct segment *)(to + in.fs) + 1, hidden + GS);
    to_vmcb((struct segment *)(to + in.ldtr), hidden + LDTR);
    to_vmcb((struct segment *)(to + in.tr), hidden + TR);
    msrs[0] = sysenter[3];
    memcpy(msrs + 1, syscall, 32);
    msrs[5] = (uint32_t)sysenter[0];
    msrs[6] = sysenter[1];
    msrs[7] = sysenter[2];
    advance(rt, 3);
    return 3;
}

/* RDTSC and RDTSCP. */
static int64_t rdtsc(struct runtime *rt, struct switcher *sw)
{
    const uint8_t *code = rt->code;
    uint64_t tsc = sw->deadline - (uint64_t)rt->budget + sw->tsc_offset;
    uint32_t size = code[1] == 0x31 ? 2 : code[1] == 0x01 && code[2] == 0xf9 ? 3 : 0;
    if (!size || rt->code_size < size || code[0] != 0x0f || !plain(rt))
        return -1;
    REG(rt, 0) = (uint32_t)tsc;
    REG(rt, 2) = tsc >> 32;
    if (size == 3)
        REG(rt, 1) = FIELD(rt, uint32_t, at.tsc_aux);
    advance(rt, size);
    return size;
}

/* In 64-bit code; other modes load PDPTEs, or an EIP that wraps. */
static int64_t write_cr3(struct runtime *rt, struct switcher *sw)
{
    const uint8_t *code = rt->code;
    uint32_t rex = code[0] == 0x41, rm = (code[rex + 2] & 7) | rex << 3;
    uint64_t value = REG(rt, rm);
    if (rt->code_size < 3 + rex || code[rex] != 0x0f || code[rex + 1] != 0x22 || !(FIELD(rt, uint32_t, at.hflags) & HF_CS64) ||
        value & sw->physical_mask || !plain(rt))
        return -1;
    CR(rt, 3) = value;
    rt->flush = FLUSH | FORGET;
    advance(rt, 3 + rex);
    return 3 + rex;
}

/* The length of the instruction at RIP if it is `0F second [third]` or HLT without prefixes, else 0. */
static uint32_t length(const struct runtime *rt, uint32_t code)
{
    const uint8_t *bytes = rt->code;
    if (rt->code_size <= 3)
        return 0;
    if (bytes[0] == 0x0f)
        return bytes[1] == 0x01 && bytes[2] >= 0xc8 ? 3 : bytes[1] == 0xa2 && code == CPUID ? 2 : 0;
    return bytes[0] == 0xf4 && code == HLT ? 1 : 0;
}

/* Exits that one intercept bit decides, without an EXITINFO. */
static bool is_plain(uint32_t code)
{
    return code == CPUID || code == HLT || (code >= VMRUN && code < SKINIT);
}

/* Whether rAX has to be looked at before the intercept. */
static bool has_operand(uint32_t code)
{
    return code == VMRUN || code == VMLOAD || code == VMSAVE;
}

/* A byte of a permission map; ones where no memory is. */
static uint32_t map_byte(const struct switcher *sw, uint64_t base, uint32_t at_byte)
{
    uint64_t spa = (base & ~(uint64_t)(PAGE - 1)) + at_byte;
    return in_ram(sw, spa & ~(uint64_t)(PAGE - 1)) ? sw->ram[spa] : 0xff;
}

static int64_t msr_exit(struct runtime *rt, struct switcher *sw)
{
    static const uint32_t firsts[] = {0, 0xc0000000, 0xc0010000};
    struct entry *e = &sw->entries[sw->inside];
    uint32_t msr = (uint32_t)REG(rt, 1), write = rt->code[1] == 0x30;
    bool intercepted = true;        /* MSRs that the map does not cover always are */
    if (rt->code_size <= 3 || rt->code[0] != 0x0f || (rt->code[1] != 0x30 && rt->code[1] != 0x32))
        return -1;
    for (uint32_t block = 0; block < 3; block++)
        if (msr - firsts[block] < 0x2000) {
            uint32_t position = 2 * (msr - firsts[block]) + write;
            intercepted = map_byte(sw, e->msrpm, 0x800 * block + position / 8) >> (position & 7) & 1;
        }
    return intercepted ? vmexit(rt, sw, MSR, write, 0, FIELD(rt, uint64_t, at.eip) + 2) : -1;
}

/* IN and OUT without prefixes but 66, where IOPL permits them. */
static int64_t io_exit(struct runtime *rt, struct switcher *sw)
{
    struct entry *e = &sw->entries[sw->inside];
    const uint8_t *code = rt->code;
    uint32_t hflags = FIELD(rt, uint32_t, at.hflags), port = rt->io_port & 0xffff, size = rt->io_size, length = 1, bits, info;
    uint64_t rflags = FIELD(rt, uint64_t, at.eflags), next;
    if (CR(rt, 0) & 1 && ((hflags & 3) > (rflags >> 12 & 3) || rflags & RFLAGS_VM))
        return -1;
    if (rt->code_size <= 3)
        return -1;
    if (*code == 0x66)
        code++, length++;
    if ((*code & 0xfc) == 0xe4)
        length++;
    else if ((*code & 0xfc) != 0xec)
        return -1;
    bits = map_byte(sw, e->iopm, port / 8);
    if ((port & 7) + size > 8)
        bits |= map_byte(sw, e->iopm, port / 8 + 1) << 8;
    if (!(bits >> (port & 7) & ((1u << size) - 1)))
        return -1;
    info = port << 16 | size * IO_SIZE | 3 * IO_SEGMENT | (rt->io_write ? 0 : IO_IN);
    info |= hflags & HF_CS64 ? IO_A64 : hflags & HF_CS32 ? IO_A32 : IO_A16;
    next = FIELD(rt, uint64_t, at.eip) + length;
    return vmexit(rt, sw, IOIO, info, next, next);
}

static bool intercepts(const struct switcher *sw, uint32_t code)
{
    return sw->entries[sw->inside].words[code >> 5] >> (code & 31) & 1;
}

static int64_t exits(struct runtime *rt, void *user)
{
    struct switcher *sw = user;
    uint32_t code = rt->reason == IO ? IOIO : rt->intno - VMEXIT, size;
    uint64_t spa;
    if (code / 32 < 6 && sw->watched[code / 32] >> (code & 31) & 1)
        return -1;
    if (rt->reason == IO)
        return sw->inside >= 0 && intercepts(sw, IOIO) ? io_exit(rt, sw) : -1;
    if (sw->inside == -1) {
        if (code == RDTSC)
            return rdtsc(rt, sw);
        if (code == CR3_WRITE)
            return write_cr3(rt, sw);
        if (code < VMRUN || code > VMSAVE || length(rt, code) != 3)
            return -1;
        return code == VMRUN ? vmrun(rt, sw) : code == VMLOAD ? vmload(rt, sw) : code == VMSAVE ? vmsave(rt, sw) : -1;
    }
    if (sw->inside >= 0 && code == MSR && intercepts(sw, MSR))
        return msr_exit(rt, sw);
    if (sw->inside < 0 || !is_plain(code) || !(size = length(rt, code)) || !intercepts(sw, code) ||
        (has_operand(code) && !operand(rt, sw, false, &spa)))
        return -1;
    return vmexit(rt, sw, code, 0, 0, FIELD(rt, uint64_t, at.eip) + size);
}

static PyObject *symbols(PyObject *self, PyObject *args)
{
    Py_buffer context, vmcb;
    bool taken;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*", &context, &vmcb))
        return NULL;
    taken = take_offsets(&context, &at, sizeof at);
    if (!take_offsets(&vmcb, &in, sizeof in) || !taken)
        return NULL;
    return Py_BuildValue("{sKsKsKsKsK}", "on_exit", (unsigned long long)(uintptr_t)exits, "size",
                         (unsigned long long)sizeof(struct switcher), "record", (unsigned long long)sizeof(struct record),
                         "image", (unsigned long long)sizeof(struct image), "ring", (unsigned long long)sizeof(struct ring));
}

static PyMethodDef methods[] = {
    {"symbols", symbols, METH_VARARGS, "Take the offsets in a context and in a VMCB; give the hook and the sizes of the state."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_switch", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__switch(void)
{
    return PyModule_Create(&module);
}

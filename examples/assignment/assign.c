/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Direct assignment. The guest reaches the device's registers by its nested page table, without a #VMEXIT; the device reaches the
 * guest's memory by the IOMMU's page table, at the addresses that the guest gives it. Only configuration space is emulated:
 * who sets BARs rules the machine. The guest's interrupt message is kept in mind; what the device really sends is an index of
 * the IOMMU's interrupt table, which makes of it a vector of the hypervisor's, and that in turn makes of it the guest's vector.
 */
#include "assign.h"
#include "apic.h"
#include "cpu.h"
#include "iommu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"

#define GUEST_SLOT 0x08       /* 00:01.0 on the guest's bus */
#define GUEST_BAR  0xe0000000 /* gpa of the device's registers */
#define BAR_SIZE   0x100000
#define LEVELS     3          /* reaches 512 GiB; what a guest has is less by far */

#define MSI_TARGET 0xfee00000u
#define APIC_ID    0x20
#define APIC_EOI   0xb0
#define RFLAGS_IF  (1ull << 9)

#define NPT_PRESENT_WRITABLE_USER 7ull
#define NPT_UNCACHED              0x18ull /* PCD, PWT */
#define NPT_ADDRESS               0x000ffffffffff000ull

static struct {
    struct guest *guest;
    uint32_t device, selected; /* `selected`: what the guest wrote to port CF8 */
    uint64_t blocked;
    int guarded;
    /* The MSI capability: where it is, and what the guest wrote there: control, address, upper half of it, data. */
    uint32_t msi, message[4];
} owned;

static volatile uint32_t *apic(uint32_t offset)
{
    return (volatile uint32_t *)((rdmsr(MSR_APIC_BASE) & 0x000ffffffffff000) + offset);
}

static void map_registers(struct guest *guest, uint64_t gpa, uint64_t spa)
{
    uint64_t *table = guest->table;
    for (int level = 3; level > 0; level--) {
        uint64_t *entry = &table[gpa >> (12 + 9 * level) & 511];
        if (!*entry)
            *entry = physical(allocate_page()) | NPT_PRESENT_WRITABLE_USER;
        table = (uint64_t *)(*entry & NPT_ADDRESS);
    }
    table[gpa >> 12 & 511] = spa | NPT_PRESENT_WRITABLE_USER | NPT_UNCACHED;
}

/* The device finds every page of the guest where the guest thinks it is, and nothing else. */
static void map_memory(struct guest *guest, uint64_t *root)
{
    for (uint64_t gpa = 0; gpa < guest->kind->size; gpa += PAGE_SIZE)
        iommu_map(root, LEVELS, gpa, guest_to_system(guest, gpa), PTE_READ | PTE_WRITE);
}

void assign(struct guest *guest, uint32_t identity, int guarded)
{
    uint32_t device = pci_find(PCI_IDENTITY, 0xffffffff, identity);
    if (device == PCI_NOWHERE)
        fatal("the device to give away is not on bus 0 (README.md names it)");
    owned.guest = guest;
    owned.device = device;
    owned.guarded = guarded;
    owned.msi = pci_capability(device, PCI_CAPABILITY_MSI);
    uint64_t bar = pci_read(device, PCI_BAR0) & ~15u;
    for (uint64_t offset = 0; offset < BAR_SIZE; offset += PAGE_SIZE)
        map_registers(guest, GUEST_BAR + offset, bar + offset);
    if (guarded) {
        uint64_t *root = allocate_page();
        map_memory(guest, root);
        iommu_assign(device, (uint16_t)guest->number, root, LEVELS);
        iommu_remap(device, DEVICE_VECTOR, (uint8_t)(*apic(APIC_ID) >> 24));
    }
    print("hypervisor: device 00:%02x.%u is guest %u's, %s\n", (uint64_t)(device >> 3), (uint64_t)(device & 7), guest->number,
          guarded ? "and reaches this guest's memory only" : "and NOTHING KEEPS IT from anyone's memory");
}

/* Which word of the MSI capability a register is: 0 to 3 as in `message`, or -1. */
static int msi_word(uint32_t offset)
{
    int wide = owned.msi && pci_read(owned.device, owned.msi) & PCI_MSI_WIDE;
    if (!owned.msi || offset < owned.msi || offset > owned.msi + PCI_MSI_DATA(wide))
        return -1;
    return offset == owned.msi + PCI_MSI_DATA(wide) ? 3 : (int)(offset - owned.msi) / 4;
}

/* The vector that the guest has asked for, or 0: fixed interrupts are what is passed on. */
static uint8_t guest_vector(void)
{
    uint32_t vector = owned.message[3] & 0xff, delivery = owned.message[3] >> 8 & 7;
    if (!(owned.message[0] & PCI_MSI_ENABLE) || owned.message[1] >> 20 != MSI_TARGET >> 20 || delivery || vector < 32)
        return 0;
    return (uint8_t)vector;
}

/* The guest decides whether the device interrupts, and not how. Without an IOMMU the message itself says what it becomes. */
static void msi_write(int word, uint32_t value)
{
    owned.message[word] = value;
    if (guest_vector())
        pci_interrupt_by(owned.device, MSI_TARGET, owned.guarded ? 0 : DEVICE_VECTOR);
    else
        pci_write(owned.device, owned.msi, pci_read(owned.device, owned.msi) & ~PCI_MSI_ENABLE);
}

/* What the guest reads of its own bus: one device, with the registers where its gpa is. */
static uint32_t config_read(uint32_t address)
{
    uint32_t offset = address & 0xfc;
    if (!(address >> 31) || (address >> 8 & 0xffff) != GUEST_SLOT)
        return PCI_NOWHERE;
    if (offset == PCI_BAR0)
        return GUEST_BAR;
    int word = msi_word(offset);
    if (word > 0)
        return owned.message[word];
    if (word == 0)
        return (pci_read(owned.device, offset) & ~PCI_MSI_ENABLE) | (owned.message[0] & PCI_MSI_ENABLE);
    return pci_read(owned.device, offset);
}

static void config_write(uint32_t address, uint32_t value)
{
    if (!(address >> 31) || (address >> 8 & 0xffff) != GUEST_SLOT)
        return;
    int word = msi_word(address & 0xfc);
    if (word >= 0)
        msi_write(word, value);
    if ((address & 0xfc) != PCI_COMMAND)
        return;
    pci_write(owned.device, PCI_COMMAND, value & (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER));
}

int assign_port(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    uint64_t info = vmcb->exit_info1; /* APM2 15.10.2: bit 0 IN, 2 string, 6:4 size, 31:16 port */
    uint16_t port = (uint16_t)(info >> 16);
    if (vmcb->exit_code != EXIT_IOIO || guest != owned.guest || info & 1 << 2 || (info >> 4 & 7) != 4)
        return 0;
    if (port == PCI_ADDRESS_PORT) {
        if (info & 1)
            vmcb->rax = owned.selected;
        else
            owned.selected = (uint32_t)vmcb->rax;
    } else if (port == PCI_DATA_PORT) {
        if (info & 1)
            vmcb->rax = config_read(owned.selected);
        else
            config_write(owned.selected, (uint32_t)vmcb->rax);
    } else {
        return 0;
    }
    vmcb->rip = vmcb->exit_info2;
    vmcb->int_shadow &= ~1ull;
    vmcb->event_inject = 0;
    guest->exits[BY_IOIO]++;
    return 1;
}

/* Only one virtual interrupt can wait, as V_IRQ: enough for one device with one message. It runs with GIF set, so the guest's
   VMCB is complete, and whoever it interrupts does not touch these fields of a guest without a timer. */
void assign_interrupt(void)
{
    uint8_t vector = guest_vector();
    *apic(APIC_EOI) = 0;
    if (!vector)
        return;
    owned.guest->vmcb->int_vector = vector;
    owned.guest->vmcb->int_control |= V_IRQ | V_INTR_PRIO(15) | V_IGN_TPR;
    if (owned.guest->state == HALTED)
        owned.guest->state = RUNNABLE;
}

int assign_halt(struct guest *guest)
{
    struct vmcb *vmcb = guest->vmcb;
    if (vmcb->exit_code != EXIT_HLT || guest != owned.guest || !(vmcb->rflags & RFLAGS_IF) || !guest_vector())
        return 0;
    vmcb->rip++; /* HLT has one byte */
    vmcb->int_shadow &= ~1ull;
    vmcb->event_inject = 0;
    guest->exits[BY_HLT]++;
    __asm__ volatile("cli"); /* the interrupt comes before this is looked at, or after the guest sleeps */
    if (!(vmcb->int_control & V_IRQ))
        guest->state = HALTED;
    __asm__ volatile("sti");
    return 1;
}

/* A place to stop: the IOMMU has refused something, and this is its record. */
static __attribute__((noinline)) void on_blocked(struct event event)
{
    uint64_t code = event.low >> 60, device = event.low & 0xffff;
    owned.blocked++;
    if (code != EVENT_IO_PAGE_FAULT) {
        print("hypervisor: IOMMU: event %x: %016x %016x\n", code, event.high, event.low);
        return;
    }
    print("hypervisor: IOMMU: blocked a %s by device %02x:%02x.%u%s at iova %x: %s\n", event.low >> 53 & 1 ? "write" : "read",
          device >> 8, device >> 3 & 31, device & 7, device == owned.device ? ", which is guest 1's," : "", event.high,
          event.low >> 54 & 1 ? "not allowed" : "nothing is mapped there");
}

void assign_report(void)
{
    struct event event;
    while (iommu_event(&event))
        on_blocked(event);
}

uint64_t assign_blocked(void)
{
    return owned.blocked;
}

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An AMD IOMMU (AMD publication 48882), as much of it as one assigned device needs. */
#ifndef IOMMU_H
#define IOMMU_H

#include "guest.h"

/* Find it, give it a device table in which every device is denied, and turn it on. */
void iommu_start(void);
/* From now on the device's addresses are this guest's, and nothing else is in its reach. */
void iommu_assign(uint32_t device, const struct guest *guest);
/* Print what the IOMMU has logged; returns how many events there were. */
uint32_t iommu_report(void);

#endif

/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Switching the processor's virtualisation on, and the part of a VMCB that is the same for each guest. */
#ifndef SVM_H
#define SVM_H

#include "guest.h"

/* Check for SVM and nested paging, say what is missing, enable. */
void svm_start(void);
/* Intercepts, permission maps, ASID and interrupt control. */
void svm_prepare(struct guest *guest);
/* Run the guest until its next #VMEXIT. */
void svm_enter(struct guest *guest);
/* 1 if the processor stores the next instruction's address in the VMCB (CPUID 8000_000A EDX[3]). */
extern int has_next_rip;

#endif

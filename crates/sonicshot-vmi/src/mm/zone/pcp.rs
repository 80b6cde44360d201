//! The per-CPU lists: where they are, and of which order each is.

use crate::error::VmiError;
use crate::kernel::Kernel;
use sonicshot::PageSize;

/// `NR_PCP_LISTS` is 3 to 14.
pub(super) const MAX_PCP_LISTS: u64 = 64;

/// The layout of the lists in a processor's `struct per_cpu_pages`, and of their content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PcpLayout {
    /// From the zone's `__percpu` pointer to `struct per_cpu_pages`.
    pub pcp: u64,
    pub count: u64,
    pub lists_at: u64,
    pub lists: u64,
    /// `MIGRATE_PCPTYPES`.
    pub types: u64,
    /// Of the lists behind the ones of order 0 to `PAGE_ALLOC_COSTLY_ORDER`.
    pub huge_order: u32,
}

/// `PAGE_ALLOC_COSTLY_ORDER`, the same since 2.6.
const COSTLY_ORDER: u64 = 3;

impl PcpLayout {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        // To 5.13 the lists were inside `struct per_cpu_pageset`.
        let pcp = kernel
            .member("per_cpu_pageset", "pcp")?
            .map_or(0, |member| member.offset);
        let lists = kernel.need_member("per_cpu_pages", "lists")?;
        let types = kernel.need_constant("MIGRATE_PCPTYPES")?;
        match (lists.len, u64::try_from(types)) {
            (Some(len), Ok(types))
                if (1..=MAX_PCP_LISTS).contains(&len) && (1..=len).contains(&types) =>
            {
                Ok(Self {
                    pcp,
                    count: kernel.need_member("per_cpu_pages", "count")?.offset,
                    lists_at: lists.offset,
                    lists: len,
                    types,
                    huge_order: Self::huge_order(kernel.build.page_size),
                })
            }
            _ => Err(VmiError::Unsupported {
                what: format!("per_cpu_pages.lists of {:?} for {types} types", lists.len),
            }),
        }
    }

    /// `HPAGE_PMD_ORDER`: a page of page tables has a pointer of 8 bytes for each.
    pub(crate) fn huge_order(page_size: PageSize) -> u32 {
        (page_size.bytes() / 8).ilog2()
    }

    /// `pindex_to_order` (`mm/page_alloc.c`, since 5.14): the order is in no page.
    pub(crate) fn order(&self, index: u64) -> Result<u32, VmiError> {
        const WITH_HUGE: u64 = COSTLY_ORDER + 2;
        let order_above = self.types.checked_mul(WITH_HUGE);
        let order = index.checked_div(self.types);
        let order = order.and_then(|order| u32::try_from(order).ok());
        if let Some(order) = order.filter(|order| u64::from(*order) <= COSTLY_ORDER) {
            Ok(order)
        } else if order_above.is_some_and(|end| index < end) {
            Ok(self.huge_order)
        } else {
            Err(VmiError::Unsupported {
                what: format!("per-CPU list {index}"),
            })
        }
    }
}

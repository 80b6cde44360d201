//! The pages that go of an image, by a plan that has been through the guards of `sonicshot-dump`.

use crate::{Dropped, XlImage};
use sonicshot::{Gpa, GpaRange, PageSize, PfnRange, PrunePlan};

impl XlImage {
    /// The frames of `plan` that can be left out of this image: those that may read as
    /// [anything](sonicshot::Fill::Any) after a restore, and are ordinary pages. Nothing is asked of
    /// the guest: a plan must have been through the guards of `sonicshot-dump`.
    #[doc(hidden)]
    #[must_use]
    pub fn dropped(&self, plan: &PrunePlan) -> Dropped {
        let plan = plan.clone().any_filled_only();
        let mut runs: Vec<PfnRange> = Vec::new();
        let mut frames = self.frames().iter().peekable();
        let everything = GpaRange::new(Gpa::ZERO, Gpa::new(u64::MAX));
        for part in plan.dropped_in(everything) {
            let part = part.whole_frames(PageSize::SIZE_4K);
            while frames.next_if(|frame| frame.pfn() < part.start()).is_some() {}
            while let Some(frame) = frames.next_if(|frame| frame.pfn() < part.end()) {
                if !frame.may_be_dropped() {
                    continue;
                }
                let Some(one) = PfnRange::with_len(frame.pfn(), 1) else {
                    continue;
                };
                one.append_to(&mut runs);
            }
        }
        Dropped { runs }
    }
}

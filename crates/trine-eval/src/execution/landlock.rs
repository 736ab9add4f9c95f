//! Takes from a thread, and from what it starts, the right to write outside a folder and to use TCP.

use std::path::Path;
use std::thread;

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// What is asked for; an older kernel enforces what it knows of it.
const KNOWN: ABI = ABI::V4;

/// Whether this kernel confines at all. Tried on a thread that ends.
pub(super) fn is_enforced() -> bool {
    let tried = thread::spawn(|| confine(&std::env::temp_dir()));
    let status = tried.join().ok().and_then(Result::ok);
    status.is_some_and(|status| status.ruleset != RulesetStatus::NotEnforced)
}

/// Confines the calling thread for good: it reads everywhere and writes below `folder` only.
pub(super) fn confine(folder: &Path) -> Result<RestrictionStatus, RulesetError> {
    let write = AccessFs::from_write(KNOWN);
    let rules = Ruleset::default()
        .handle_access(write)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .create()?;
    match PathFd::new(folder) {
        Ok(folder) => rules.add_rule(PathBeneath::new(folder, write))?.restrict_self(),
        // A folder that is gone: nowhere to write.
        Err(_) => rules.restrict_self(),
    }
}

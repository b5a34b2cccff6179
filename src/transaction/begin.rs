//! How a transaction begins: the steps that travel with its first statement, under the same Sync.

use std::iter::once;

use crate::connect::Step;
use crate::options::TransactionOptions;

/// BEGIN with its modes, and a step for each local setting. Should one of them fail, the server reads over the rest of
/// them and over the statement.
pub(super) fn steps(options: &TransactionOptions) -> impl Iterator<Item = Step> {
    let settings = options.local_settings().iter();
    let settings = settings.map(|(name, value)| Step::Setting(name.clone(), value.clone()));
    once(Step::Begin(options.begin())).chain(settings)
}

//! The contract of the store, run on both engines.

#[cfg(test)]
mod backup;
#[cfg(test)]
mod backup_kill;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod collection;
#[cfg(test)]
mod collection_race;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod directory;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod grace;
#[cfg(test)]
mod identity;
#[cfg(test)]
mod kill;
#[cfg(test)]
mod kill_transfer;
#[cfg(test)]
mod lock_order;
#[cfg(test)]
mod modes;
#[cfg(test)]
mod object_store;
#[cfg(test)]
mod object_store_faults;
#[cfg(test)]
mod postgres;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod reindex;
#[cfg(test)]
mod reports;
#[cfg(test)]
mod retention;
#[cfg(test)]
mod schema;
#[cfg(test)]
mod scrub;
#[cfg(test)]
mod stand_in;
#[cfg(test)]
mod transfer;
#[cfg(test)]
mod uploads;
#[cfg(test)]
mod wrong_answers;

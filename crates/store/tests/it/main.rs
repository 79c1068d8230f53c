//! The contract of the store, run on both engines.

#[cfg(test)]
mod backup;
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
#[cfg(feature = "failpoints")]
#[cfg(test)]
mod kill;
#[cfg(test)]
mod modes;
mod object_store;
#[cfg(test)]
mod postgres;
mod reports;
#[cfg(test)]
mod scrub;
#[cfg(test)]
mod uploads;

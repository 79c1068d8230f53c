//! Deaths in the middle of making the tables of a store.

use anyhow::{Context as _, bail};

use super::{Known, after};
use crate::load::Load;
use crate::mode::{World, start};

/// Kills the first start of a store at a step of making its tables, starts it again, and looks whether it serves.
pub(super) fn once(world: &World, point: &str, seed: u64) -> anyhow::Result<u64> {
    let site = world.site()?;
    let plain = site.options();
    let doomed = plain.clone().env("LONGSHORE_FAILPOINT", point);
    match doomed.start() {
        Ok(_) => bail!("`{point}` was not passed by the first start of a store"),
        Err(error) if error.contains("unix_wait_status(9)") => {}
        Err(error) => bail!("{error}"),
    }
    let mut server = start(&plain).context("the start after the death")?;
    let urls = [server.url().to_owned()];
    let load = Load::start(&urls, "load", 2, seed);
    let begun = std::time::Instant::now();
    while load.acknowledged() < 40 {
        if begun.elapsed() > std::time::Duration::from_mins(1) {
            bail!("it does not serve:\n{}", server.logged());
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let mut known = Known::Ledgers(load.finish());
    server.stop();
    drop(server);
    let checked = after(&site, &plain, Vec::new(), vec![&mut known])?;
    world.forget(site);
    Ok(checked)
}

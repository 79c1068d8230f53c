//! What is asked of the engine outside a deployment: can it pull, what runs, take it away.

use oci::Reference;

use super::ComposeEngine;
use crate::engine::EngineError;

impl ComposeEngine {
    /// Pulls one image by digest, to find out whether the engine reaches its registry.
    ///
    /// # Errors
    /// As `pull` of a deployment.
    pub async fn pull_image(&self, image: &Reference) -> Result<(), EngineError> {
        let credentials = (self.options.credentials)(&image.host);
        self.engine().await?.pull(image, None, credentials).await
    }

    /// The images of a project's running containers: service and image as the engine was asked for it.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`].
    pub async fn running_images(
        &self,
        project: &str,
    ) -> Result<Vec<(String, String)>, EngineError> {
        let containers = self.engine().await?.containers(project).await?;
        Ok(containers
            .into_iter()
            .map(|container| (container.service, container.image))
            .collect())
    }

    /// Removes what `target` made of a project: its containers, the project's networks when it made
    /// all of them, and the images that were pulled from `host` for it. Volumes stay, they hold data.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`]; calling it again goes on.
    pub async fn remove_project(
        &self,
        project: &str,
        target: &str,
        host: &str,
    ) -> Result<(), EngineError> {
        let engine = self.engine().await?;
        let (ours, strangers): (Vec<_>, Vec<_>) = engine
            .containers(project)
            .await?
            .into_iter()
            .partition(|container| container.target.as_deref() == Some(target));
        for container in &ours {
            engine.remove(&container.id).await?;
        }
        if strangers.is_empty() {
            engine.remove_networks(project).await?;
        }
        engine.remove_images(host).await
    }
}

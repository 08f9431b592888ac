//! What is counted of devices.

use prometheus_client::{metrics::counter::Counter, registry::Registry};

/// What becomes of devices.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceCounters {
    pub(crate) registered: Counter,
    pub(crate) forgotten: Counter,
    pub(crate) refused: Counter,
}

impl DeviceCounters {
    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Devices that were registered, as each has to acknowledge a message";
        registry.register("delivery_devices_registered", help, self.registered.clone());
        let help = "Devices that were forgotten, as they were not seen for 30 days";
        registry.register("delivery_devices_forgotten", help, self.forgotten.clone());
        let help = "Times that a device was refused because its user has 16 others";
        registry.register("delivery_devices_refused", help, self.refused.clone());
    }
}
